"""Labels by people in a browser: tasks to compare, answers kept as they come, and the page that asks."""
