"""The keys and values of the past: what stays, where it lies, what each read sees."""
