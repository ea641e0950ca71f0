"""What ditfastattn2 must know of each model family beyond the views: its processors, and how they use their output."""
