"""Tests of tcpmig, and the hosts, workloads and watchers that they run on."""
