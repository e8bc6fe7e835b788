"""The commands of `mdm`, one file each."""
