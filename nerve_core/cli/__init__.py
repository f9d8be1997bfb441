"""The `nerve` command without ROS: arguments in, files, tables and JSON out."""
