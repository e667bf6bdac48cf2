"""The interception ruleset: from a plan to text, from text to the kernel, and back out of it.

plan.py       what is to be intercepted (frozen)
nft.py        the plan as nft text                     iptables.py   as iptables-restore text
routing.py    the rules of routing and the route that intercepted packets need
programs.py   runs nft, iptables and ip
ruleset.py    apply with roll-back, drain, remove, compare with the kernel
guard.py      a process of its own that holds the ruleset and undoes it when the relay is gone
managed.py    the relay's end of the guard
"""
