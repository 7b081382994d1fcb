"""``python -m cute_ssm tune``: search the configs of declared calls, and merge the best into a table.

`problems` says what is searched, `search` how, `objectives` what a config costs, `engines` on which processes.  A
`journal` remembers what was measured, so that a search that was stopped goes on.
"""
