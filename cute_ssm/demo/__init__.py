"""A small Mamba-2 language model whose decode steps run through the package's operators.

Several tokens a step through :func:`cute_ssm.checkpointing_ssu`, or one through
:func:`cute_ssm.selective_state_update`.  ``ssd`` holds the sequence forms of the recurrence, ``model`` the network,
``tokenizer`` the vocabulary, ``weights`` the shipped file, ``sampling`` the choice of a token, ``exact`` the choices
that do not depend on roundings, ``loop`` the generation token by token and ``speculation`` that of several at once,
``report`` the table and the plot, and ``cli`` the command.
"""

DRAFT = 3  # tokens that are drafted for a step
