"""Looking into a running relay: who may ask, over which sockets, how questions are read and answered.

Nothing in here knows the relay: what it tells is made elsewhere.
"""
