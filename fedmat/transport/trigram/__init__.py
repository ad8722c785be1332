"""TriGram: one encrypted round of three roles, from which only inner products and one sum are ever opened.

``ring`` holds the numbers, ``messages`` what is signed and sealed, ``shares`` a role's arithmetic, ``roles`` the state
machine, ``site`` the member's side, ``exchange`` the courier between them.
"""
