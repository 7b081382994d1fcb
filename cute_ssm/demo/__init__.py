"""A small Mamba-2 language model whose decode steps run through :func:`cute_ssm.selective_state_update`.

``ssd`` holds the sequence forms of the recurrence, ``model`` the network, ``tokenizer`` the vocabulary, ``weights``
the shipped file, ``sampling`` the choice of a token, ``loop`` the generation, ``report`` the table and ``cli`` the
command.
"""
