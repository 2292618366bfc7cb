"""One container for files and wires: format (sans-IO), writer and reader of files, inspect."""
