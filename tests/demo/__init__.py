"""`make demo`: real servers move between two hosts while their clients work, and what the clients saw of it."""
