"""For those who test: golden trajectories, and the conformance kit for components and specs of one's own."""
