"""Process trees to images and back: stopping, collecting, writing; reading, building, running."""
