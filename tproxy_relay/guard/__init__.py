"""The process that holds the ruleset, and the supervisor's end of it."""
