"""Memory of a process: its mappings (vma, layout), their pages (scan, pages), what cannot be moved (verdicts), and
whether two memories are equal (compare)."""
