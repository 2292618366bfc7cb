"""What is tested inside a guest, by a pytest of its own (tests/system/test_guest.py): not collected on this machine."""
