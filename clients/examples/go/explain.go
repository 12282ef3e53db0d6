package main

import (
	"fmt"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// explain makes one sentence of an error: the server's own, with its reason, and the request id to ask about.
func explain(err error) string {
	failure, ok := status.FromError(err)
	if !ok {
		return err.Error()
	}
	reason, requestID, violations := code(failure.Code()), "", ""
	var wait time.Duration
	for _, detail := range failure.Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			if detail.Domain == "llmos" {
				reason, requestID = detail.Reason, detail.Metadata["request_id"]
			}
		case *errdetails.RetryInfo:
			wait = detail.RetryDelay.AsDuration()
		case *errdetails.BadRequest:
			for _, violation := range detail.FieldViolations {
				violations += fmt.Sprintf("\n  %s: %s", violation.Field, violation.Description)
			}
		}
	}
	text := fmt.Sprintf("%s (%s)", failure.Message(), reason)
	if wait > 0 {
		text += fmt.Sprintf(" Try again in %s.", wait)
	}
	if requestID != "" {
		text += fmt.Sprintf(" [request %s]", requestID)
	}
	return text + violations
}

// code names a status code as the contract does.
func code(c codes.Code) string {
	return strings.ToUpper(strings.TrimPrefix(c.String(), "codes."))
}
