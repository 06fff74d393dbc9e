"""Who may do what: accounts, rights on the tree, tokens, limits, and the record of it all."""
