"""What a site does with its own records: read, convert, check, split, version."""
