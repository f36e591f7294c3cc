"""Kinds of hostile input: each makes files in a folder and says what to run on them."""
