"""The process that keeps the listeners, the ruleset and the workers, and touches no connection itself."""
