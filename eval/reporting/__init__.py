"""What a report shows: artifacts read, compared, drawn."""
