"""Training recipes of the bundled models: one stage per file, over one resumable loop."""
