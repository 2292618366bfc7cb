"""Process trees and their addresses, from this host to that one: the nine steps of ``docs/design/contracts.md``."""
