"""`splitserve bench`: `commands` are its options, `asked` what they mean, `measuring` does it, `runs` keeps it."""
