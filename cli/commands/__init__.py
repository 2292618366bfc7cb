"""One module per command: arguments in, a call of the library, a result out. No logic."""
