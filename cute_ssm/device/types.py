"""`Maybe`: the type of what a kernel may be compiled without."""

from typing import TYPE_CHECKING, Annotated, Optional, TypeVar

T = TypeVar("T")

# Whether a value is there is known when a kernel is compiled.  Code that uses it stands behind a `const_expr`, which
# narrows no type, so type checkers take the value to be there; the compiler reads `Optional`.
if TYPE_CHECKING:
    Maybe = Annotated[T, "or None"]
else:
    Maybe = Optional
