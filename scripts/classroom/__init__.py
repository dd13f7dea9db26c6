"""Student copies, teacher copies and nbgrader's assignments, all from the lessons as they are committed."""
