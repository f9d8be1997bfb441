"""nerve_ros: the ROS 2 node around nerve_core, from image message to mask message.

The interface generator makes a package of this name too (nerve_ros.msg); both are installed into one folder.
"""

from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)  # in a source folder, nerve_ros.msg lies elsewhere on the path
