class ExportError(RuntimeError): pass
