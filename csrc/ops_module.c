/* Makes the kernel library an importable module on the limited API (which CMake defines), whatever
   the Python version; loading it runs the registrations of the ops. */
#include <Python.h>

const char* tessella_refresh_env(void); /* core/env.cpp */

static PyObject* refresh_env(PyObject* self, PyObject* args) {
  (void)self;
  (void)args;
  return PyUnicode_FromString(tessella_refresh_env());
}

static PyMethodDef methods[] = {
    {"refresh_env", refresh_env, METH_NOARGS,
     "Read the TESSELLA_ environment variables again; returns what is wrong with them, or ''."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_ops", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__ops(void) { return PyModule_Create(&module); }
