"""How the bundled models are trained: one stage a file, over one loop that can be killed and
continued."""
