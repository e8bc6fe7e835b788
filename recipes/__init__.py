"""Training runs to read: `mdm train NAME` runs them, and so does torchrun."""
