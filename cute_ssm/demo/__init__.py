"""A small Mamba-2 language model that decodes through the package's operators.

Speculative steps verify several tokens with :func:`cute_ssm.checkpointing_ssu`; token-by-token generation uses
:func:`cute_ssm.selective_state_update`.  ``cli`` is the command, ``model`` the network, ``ssd`` the recurrence over
sequences, ``tokenizer`` and ``weights`` what is shipped, ``loop`` and ``speculation`` the two kinds of generation,
``sampling`` the choice of a token, ``exact`` choices that do not depend on rounding, ``report`` the table and the plot.
"""

DRAFT = 3  # drafted tokens per step
