"""The K/V memory: which past frames stay, where they are stored, what each read sees."""
