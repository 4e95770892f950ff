"""What the engines over a network share: questions to a site's worker and their replies, and the limits of both sides."""
