"""The facts, in SQL. The only place that knows SQLAlchemy, beside migrations/."""
