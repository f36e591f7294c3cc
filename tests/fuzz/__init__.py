"""Kinds of hostile input: each writes files to a folder and says what to run on them."""
