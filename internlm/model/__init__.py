"""One decoder, single-device code; nothing here knows that other ranks exist."""
