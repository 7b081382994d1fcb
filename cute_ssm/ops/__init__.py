"""Public operators: signature, docstring, validation and dispatch, one file each."""
