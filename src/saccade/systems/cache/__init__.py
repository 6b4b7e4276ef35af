"""Systems that decide what a cache keeps."""
