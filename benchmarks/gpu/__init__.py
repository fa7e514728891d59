"""The same measurements on machines with GPUs."""
