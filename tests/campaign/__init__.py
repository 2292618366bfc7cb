"""`make campaign`: hundreds of migrations at random moments, seeded, resumable."""
