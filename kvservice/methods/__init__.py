"""One published method a file. Discovered by name; nothing imports them, and they import none of one another."""
