"""``tcpmig``, the command line: arguments, progress, JSON, exit statuses. The work is done by the rooms below."""
