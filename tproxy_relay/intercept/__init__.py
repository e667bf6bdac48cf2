"""The interception ruleset: from a plan to text, from text to the kernel, and back out of it.

plan.py           what is to be intercepted (frozen)   planning.py       beside what others have on this host
nft.py            the plan as nft text                  iptables.py       as iptables-restore text
nft_words.py, iptables_words.py     what several of their rules have in common
routing.py        the rules of routing and the route    iptables_save.py  reading what is there
backend.py        the face of backend_nft.py (with nft_owner.py) and backend_iptables.py; backends.py chooses
foreign_nat.py    looks whether somebody else rewrites destinations
foreign_routing.py  looks whether somebody else's rules of routing come first
nft_listing.py    what nftables has                     legacy_tables.py  what the legacy iptables have
programs.py       runs nft, iptables and ip
ruleset.py        install with roll-back, restore, remove, compare with the kernel
lock.py           keeps other relays out of a ruleset that is held
"""
