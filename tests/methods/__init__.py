"""The methods one by one: cases worked by hand, and how they relate to each other."""
