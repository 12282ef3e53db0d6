// Command llmos-stream asks an llmos platform one question and prints the answer as it comes.
//
// It is written against the protos alone (see generate.py), as a client in any language would be: what it
// checks and how it reads errors is part of the contract, not of a library.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"

	gatewayv1 "llmos-example/gen/llmos/gateway/v1"
)

// Exit codes, the same as those of the command `llmos`.
const (
	exitFailed      = 1
	exitWrongUse    = 2
	exitInterrupted = 130
)

func main() {
	options, err := parse(os.Args[1:])
	if errors.Is(err, flag.ErrHelp) {
		os.Exit(0)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "error: %v\n", err)
		os.Exit(exitWrongUse)
	}
	// Ctrl-C cancels the context, the context the call, and the call the work at the server.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, options); err != nil {
		if ctx.Err() != nil {
			os.Exit(exitInterrupted)
		}
		fmt.Fprintln(os.Stderr, "error: "+explain(err))
		os.Exit(exitFailed)
	}
}

// run asks and prints.
func run(ctx context.Context, o *options) error {
	connection, err := grpc.NewClient(
		o.target,
		grpc.WithTransportCredentials(o.transport),
		grpc.WithUserAgent("llmos-example-go"),
		// The server allows a ping every 5 s; more often, and it closes the connection.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 20 * time.Second, Timeout: 10 * time.Second}),
	)
	if err != nil {
		return err
	}
	defer connection.Close()
	ctx, cancel := context.WithTimeout(ctx, o.timeout)
	defer cancel()
	if o.credential != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+o.credential)
	}
	model := o.model
	if model == "" {
		if model, err = firstReady(ctx, gatewayv1.NewModelServiceClient(connection)); err != nil {
			return err
		}
	}
	stream, err := gatewayv1.NewGenerationServiceClient(connection).StreamGenerate(ctx, request(o, model))
	if err != nil {
		return err
	}
	return show(stream)
}

// firstReady names a model that a replica serves now.
func firstReady(ctx context.Context, client gatewayv1.ModelServiceClient) (string, error) {
	response, err := client.ListModels(ctx, &gatewayv1.ListModelsRequest{})
	if err != nil {
		return "", err
	}
	for _, model := range response.Models {
		if model.Ready {
			return model.Id, nil
		}
	}
	return "", errors.New("the platform has no model that is ready")
}

func request(o *options, model string) *gatewayv1.StreamGenerateRequest {
	spec := &gatewayv1.GenerationSpec{
		Model: model,
		Prompt: &gatewayv1.Prompt{Kind: &gatewayv1.Prompt_Chat{Chat: &gatewayv1.Chat{
			Messages: []*gatewayv1.ChatMessage{{
				Role:    gatewayv1.Role_ROLE_USER,
				Content: []*gatewayv1.ContentPart{{Part: &gatewayv1.ContentPart_Text{Text: o.question}}},
			}},
		}}},
		MaxTokens: &o.maxTokens,
	}
	if o.temperature >= 0 {
		temperature := float32(o.temperature)
		spec.Sampling = &gatewayv1.SamplingParams{Temperature: &temperature}
	}
	return &gatewayv1.StreamGenerateRequest{Spec: spec}
}

// show prints deltas as they come, and checks what the contract promises: Started first, sequence numbers
// without a gap, Finished last.
func show(stream gatewayv1.GenerationService_StreamGenerateClient) error {
	var started *gatewayv1.Started
	var finished *gatewayv1.Finished
	var lastSeq uint64
	for {
		response, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		if started == nil && response.GetStarted() == nil && response.Event != nil {
			return fmt.Errorf("the stream began with %T instead of Started", response.Event)
		}
		switch event := response.Event.(type) {
		case *gatewayv1.StreamGenerateResponse_Started:
			started = event.Started
		case *gatewayv1.StreamGenerateResponse_Delta:
			if event.Delta.Seq != lastSeq+1 {
				return fmt.Errorf("the stream is broken: delta %d came after delta %d", event.Delta.Seq, lastSeq)
			}
			lastSeq = event.Delta.Seq
			fmt.Print(event.Delta.Text)
		case *gatewayv1.StreamGenerateResponse_Finished:
			finished = event.Finished
		default: // Moved changes nothing for a reader; an event of a later version is ignored.
		}
	}
	if finished == nil {
		return errors.New("the stream ended without Finished, so the answer is only a beginning")
	}
	reasons := make([]string, 0, len(finished.Choices))
	for _, choice := range finished.Choices {
		reasons = append(reasons, strings.TrimPrefix(choice.FinishReason.String(), "FINISH_REASON_"))
	}
	fmt.Println()
	fmt.Fprintf(os.Stderr, "usage   %d tokens of prompt, %d of answer; ended by %s\nrequest %s\n",
		finished.GetUsage().GetPromptTokens(), finished.GetUsage().GetCompletionTokens(),
		strings.Join(reasons, ", "), started.GetRequestId())
	return nil
}
