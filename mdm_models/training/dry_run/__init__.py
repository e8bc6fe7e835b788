"""What a run would take: memory, time and settings, before it starts."""
