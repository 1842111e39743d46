"""What a run tells people: terminal, warnings, profiler."""
