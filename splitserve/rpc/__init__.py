"""The wire: generated code (`gen`), its conversion to core's nouns, errors as statuses, server and channel set-up."""
