/* Makes the kernel library an importable module on the limited API (which CMake defines), whatever
   the Python version; loading it runs the registrations of the ops. */
#include <Python.h>

const char* tessella_refresh_env(void);           /* core/env.cpp */
const char* tessella_set_tuned(const char* text); /* core/tuned.cpp */

static PyObject* refresh_env(PyObject* self, PyObject* args) {
  (void)self;
  (void)args;
  return PyUnicode_FromString(tessella_refresh_env());
}

static PyObject* set_tuned(PyObject* self, PyObject* text) {
  (void)self;
  PyObject* bytes = PyUnicode_AsUTF8String(text);
  if (bytes == NULL) return NULL;
  PyObject* error = PyUnicode_FromString(tessella_set_tuned(PyBytes_AsString(bytes)));
  Py_DECREF(bytes);
  return error;
}

static PyMethodDef methods[] = {
    {"refresh_env", refresh_env, METH_NOARGS,
     "Read the TESSELLA_ environment variables again; returns what is wrong with them, or ''."},
    {"set_tuned", set_tuned, METH_O,
     "Replace the tables of measured choices (core/tuned.h); returns what is wrong, or ''."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_ops", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__ops(void) { return PyModule_Create(&module); }
