"""The demo model that ships with the project, and the scripts that made it."""
